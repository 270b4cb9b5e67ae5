"""`python -m producer` is `cutfleet`."""

from producer.cli.main import main

main(prog_name="cutfleet")
