"""Run by `make wheel` with an empty environment's Python, outside the checkout: `python -I smoke.py CHECKOUT`.

The wheel must be complete, must not know where it was built, and must compute.
"""

import re
import subprocess
import sys
import sysconfig
from importlib import metadata, resources
from pathlib import Path

import torch

import glm5
import glm5.ops
from glm5 import _native, testing
from glm5._runtime import SequencePacker

checkout = Path(sys.argv[1]).resolve()
package = Path(glm5.__file__).parent
assert checkout / "python" not in package.parents, package
assert Path(sysconfig.get_path("purelib")) in package.parents, package

# Complete: typing marker, stub, recipes, licence, command, and a tag that says what it needs.
files = resources.files("glm5")
assert files.joinpath("py.typed").is_file()
assert files.joinpath("_runtime.pyi").is_file()
recipes = sorted(p.name for p in (checkout / "python/glm5/recipes").glob("*.toml"))
assert sorted(p.name for p in files.joinpath("recipes").iterdir() if p.name.endswith(".toml")) == recipes, recipes
wheel = metadata.distribution("glm5")
assert "Apache License" in wheel.read_text("licenses/LICENSE")
tag = re.search(r"^Tag: (.*)$", wheel.read_text("WHEEL"), re.M).group(1)
assert f"{sys.version_info[0]}{sys.version_info[1]}-manylinux_2_34" in tag, tag
assert not [f for f in wheel.files if f.name.endswith((".cpp", ".h", ".cu"))]
assert not list(package.parent.glob("glm5.libs/*")), "auditwheel copied a library that torch must provide"

# Free of the build machine: no path of the checkout in a library, one file alone tied to the Python version.
libraries = sorted(package.glob("*.so"))
assert [p.name.split(".")[0] for p in libraries] == ["_runtime", "libglm5_ops"], libraries
for library in libraries:
    leaks = set(re.findall(rb"[\w./-]*" + re.escape(str(checkout).encode()) + rb"[\w./-]*", library.read_bytes()))
    assert not leaks, f"{library.name} names {sorted(leaks)[:3]}"
try:
    torch.ops.glm5.rms_norm(torch.ones(2, 3), torch.ones(4), 1e-5)
except ValueError as error:
    assert str(checkout) not in str(error), error

# It computes, on every instruction set of this processor.
judged = []
for name in sorted(set(glm5.ops.__all__)):
    for isa in _native.available_isas():
        with _native.using_cpu_isa(isa):
            report = testing.check(name, examples=2)
        assert report.ok, f"{isa}\n{report}"
    judged.append(name)
assert [p.documents.tolist() for p in SequencePacker(8).pack([5, 6, 2])] == [[0], [1, 2]]
for command in (["doctor"], ["bench", "rms_norm", "--quick", "--threads", "1"]):
    subprocess.run([Path(sys.executable).with_name("glm5"), *command], check=True)
print(f"wheel: {tag}; {len(judged)} ops agree with their references on {', '.join(_native.available_isas())}")
