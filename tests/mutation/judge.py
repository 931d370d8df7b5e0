"""Judges implementations that are known to be wrong: the conformance kit must find each by the property named for it alone.

``python -m tests.mutation.judge`` (make mutation) judges the compiled faults, with GLM5_LIBRARY_DIR on the library that
setup.py build_faulty leaves, and prints the table.
"""

import ctypes
import sys

import torch

from glm5.testing import check

EXAMPLES = 24


def judge(fault, impl=None) -> tuple[set[str], str]:
    """The properties that fail, and what is wrong with that: empty where they are those that the fault names."""
    report = check(fault.op, impl=impl, examples=EXAMPLES)
    failed, want = set(report.failed), {fault.found_by, *fault.also}
    return failed, "" if failed == want else f"{fault.op}, {fault.name}: fails {failed or 'nothing'}, want {want}\n{report}"


def main() -> int:
    """Prints a line a fault; 1 where one is not found, or found by another property, or where the sound kernels fail."""
    from glm5 import _native
    from tests.mutation.compiled import FAULTS

    torch.set_num_threads(1)
    library = ctypes.CDLL(str(_native.library_path))
    if not hasattr(library, "glm5_choose_fault"):
        raise SystemExit(f"{_native.library_path} has no faults planted; make mutation builds one that has")
    wrong = [str(r) for op in sorted({f.op for f in FAULTS}) if not (r := check(op, examples=EXAMPLES)).ok]
    print(f"{'op':28} {'fault':40} {'found by':15} and, by nature")
    for number, fault in enumerate(FAULTS, 1):
        library.glm5_choose_fault(number)
        failed, complaint = judge(fault)
        library.glm5_choose_fault(0)
        found = fault.found_by if fault.found_by in failed else "NOT FOUND"
        others = ", ".join(sorted(failed - {fault.found_by}))
        print(f"{fault.op:28} {fault.name:40} {found:15} {others}{': ' + fault.why if fault.also else ''}", flush=True)
        wrong += [complaint] if complaint else []
    print("\n".join(wrong) or f"{len(FAULTS)} faults, each found by the property named for it")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
