"""Stage 2, Internalization: let the model plan with that length, and keep to it (LAPO, arXiv 2507.15758, Eq. 6-8).

    python train_stage2.py configs/demo/stage2.yaml
    torchrun --nproc_per_node=8 train_stage2.py configs/deepscaler-1.5b/stage2.yaml

Starts from stage 1's model (model.path) and map (lapo.length_map). Every prompt ends in the thought "I will answer the
question with n tokens.", n = M(q); right answers are rewarded for keeping to n, and M(q) goes down when shorter ones
suffice. Writes model/ and the refined length_map.json. At test time no length is given.
"""

from nanolapo import cli


def main() -> None:
    config, action = cli.parse(__doc__, can_explain=True)
    from nanolapo.methods import load_method  # here, so that --help and a mistake in the config do not wait for torch
    from nanolapo.methods.lapo import Internalization

    method = load_method(config, default=Internalization)  # method.name picks another one
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
