"""`python -m minisd` is the `minisd` command."""

import sys

from minisd.app.cli import main

sys.exit(main())
