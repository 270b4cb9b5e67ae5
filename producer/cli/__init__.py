"""The commands of `cutfleet`, one module for each group. Heavy imports stay inside the commands, so that
`cutfleet --help` loads neither Celery nor boto3 nor pydantic."""
