import sys

from fastresnet.cli import main

sys.exit(main())
