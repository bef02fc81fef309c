"""Stage 1, Discovery: find out how long a right answer needs to be (LAPO, arXiv 2507.15758, Eq. 1-5).

    python train_stage1.py configs/demo/stage1.yaml
    torchrun --nproc_per_node=8 train_stage1.py configs/deepscaler-1.5b/stage1.yaml
    python train_stage1.py configs/demo/stage1.yaml method=configs/methods/laser-de.yaml run.name=laser-de

Every problem is sampled without guidance. Right answers of typical length are rewarded most, and M(q), the median length
of the right answers to problem q, is written down at every visit. Writes model/ and length_map.json to the run
directory; stage 2 starts from both. A config with method.name set trains that method instead.
"""

from nanolapo import cli


def main() -> None:
    config, action = cli.parse(__doc__, can_explain=True)
    from nanolapo.methods import load_method  # here, so that --help and a mistake in the config do not wait for torch
    from nanolapo.methods.lapo import Discovery

    method = load_method(config, default=Discovery)  # method.name picks another one
    if action == "dry-run":
        from nanolapo.plan.dry_run import dry_run as act
    elif action == "explain":
        from nanolapo.explain.explain import explain as act
    else:
        from nanolapo.loop import train
        from nanolapo.plan.beside_run import beside_run

        return train(method.config, method, beside_run)
    act(method.config, method)


if __name__ == "__main__":
    cli.run(main)
