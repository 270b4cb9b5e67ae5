"""What a job can name: models, recipes."""

from __future__ import annotations

import click


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the models: size, licence, input size, and whether their files are on this machine."""
    from producer.console.fleet import print_models

    if ctx.invoked_subcommand is None:
        print_models(as_json=as_json)


@models.command()
@click.argument("name")
@click.option(
    "--revision", default="", metavar="SHA", help="All 40 digits.  [default: the pinned one, else the latest]"
)
def pull(name: str, revision: str) -> None:
    """Fetch a model's files and pin their revision. Prints their folder."""
    from jobs.catalogue import find_preset
    from jobs.hub import pull as pull_files

    click.echo(pull_files(find_preset(name), revision=revision))


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """List the built-in recipes; `recipes show NAME` prints one, to copy and change."""
    from jobs.recipe import recipe_names, recipe_text

    if ctx.invoked_subcommand is None:
        names = recipe_names()
        for name in names:
            click.echo(f"{name:{max(map(len, names))}}  {recipe_text(name).splitlines()[0].removeprefix('# ')}")


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a recipe as TOML."""
    from jobs.recipe import recipe_text

    click.echo(recipe_text(name), nl=False)


COMMANDS = (models, recipes)
