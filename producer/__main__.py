"""`python -m producer` is `cutfleet`."""

from producer.cli import main

main(prog_name="cutfleet")
