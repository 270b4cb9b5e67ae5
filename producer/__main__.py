"""`python -m producer` runs `cutfleet`."""

from producer.cli.main import main

main(prog_name="cutfleet")
