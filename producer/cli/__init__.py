"""The commands of `cutfleet`, one module a group of them. Heavy imports stand inside the commands: `cutfleet --help`
answers without loading Celery, boto3 or pydantic."""
