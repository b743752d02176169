"""`python -m ilrec_dist.cli`: the `ilrec` command without an installed script."""

import sys

from ilrec_dist.cli.main import main

sys.exit(main())
