"""``python -m benchmarks ...`` is ``glm5 bench ...``."""

import sys

from glm5.cli.main import main

sys.exit(main(["bench", *sys.argv[1:]]))
