import sys

from glm5.cli.main import main

sys.exit(main())
