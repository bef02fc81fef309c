"""Evaluate models on problem sets: pass@1 over n samples, tokens, AES, levels, words, obedience to a stated length.

    python evaluate.py configs/demo/evaluate.yaml
    torchrun --nproc_per_node=8 evaluate.py configs/deepscaler-1.5b/evaluate.yaml

Models are listed as name=folder under evaluate.models (the first is the base of the AES column), problem sets under
data.sources. Samples are kept under the run directory; the same command continues where it stopped. Writes results.json,
results.md and plots.
"""

from pathlib import Path

from nanolapo import cli


def main() -> None:
    config, action = cli.parse(__doc__)
    from nanolapo.evaluation.evaluate import evaluate, write_results
    from nanolapo.evaluation.passes import dry_run, parse_models
    from nanolapo.ranks import Ranks
    from nanolapo.report.plots import write_figures
    from nanolapo.report.tables import markdown

    models = parse_models(config)
    if action == "dry-run":
        return dry_run(config)
    results = evaluate(config)
    if not Ranks().is_main:  # all ranks sampled and know the results; one writes them
        return
    write_results(config, results)
    text = markdown(results)
    (config.run_dir / "results.md").write_text(text, encoding="utf-8")
    print(text)
    runs = {m.name: Path(m.path).parent for m in models if (Path(m.path).parent / "metrics.jsonl").exists()}
    for path in write_figures(results, runs, config.run_dir):
        print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main)
