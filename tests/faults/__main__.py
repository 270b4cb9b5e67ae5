"""`python -m tests.faults [--minutes 10]`: the campaign of `campaign.py`."""

import sys

from tests.faults.campaign import main

sys.exit(main())
