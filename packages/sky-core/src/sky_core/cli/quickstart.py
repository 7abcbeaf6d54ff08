"""`sky quickstart`: from nothing to a trained, evaluated and sampled model in a few minutes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import click

PROMPTS = ("The ", "def ", "import ")


@click.command()
@click.argument("overrides", nargs=-1)
def quickstart(overrides: tuple[str, ...]) -> None:
    """Train a small decoder on this Python's own documentation and sources, measure it, and sample from it.

    OVERRIDES change the run: sky quickstart train.steps=100 model.n_layer=2.
    """
    from sky_core import api
    from sky_core.cli.eval import print_evaluation

    run_file = Path(str(files("sky_core") / "quickstart.yaml"))
    click.echo(f"run file  {run_file}", err=True)
    result = api.train(run_file, overrides)
    model, tokenizer = api.load(result.directory)
    print_evaluation(result.evaluation)
    for prompt in PROMPTS:
        text = api.generate(model, tokenizer, prompt, max_new_tokens=80, temperature=0.7, top_p=0.95, seed=1)
        click.echo(f"\n--- {prompt!r}\n{prompt}{text}")
    run = result.directory
    click.echo(
        f"\n{result.state} at step {result.step}\n"
        f"everything is in {run}: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/last\n"
        "what to type next:\n"
        f'  sky sample {run} --prompt "def main(" --temperature 0.8 --top-p 0.95\n'
        f"  sky eval {run}\n"
        "  sky runs\n"
        f"  sky show {run}/config.yaml\n"
        f"  sky resume {run} train.steps={2 * result.step}      train it twice as long\n"
        "  sky data prepare my_texts/ --out data/mine     then: sky train my_run.yaml data.path=data/mine"
    )
