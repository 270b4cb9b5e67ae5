"""`python -m tests.faults [--minutes 10]`: the campaign of `campaign.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.faults.campaign import main

sys.exit(main())
