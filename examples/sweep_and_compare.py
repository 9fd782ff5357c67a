"""Train a grid of SAEs on one clean pass, and put them beside each other on one page.

    python examples/sweep_and_compare.py [--tokens 40000]

Three objectives at two sparsities on the bundled model, as `e2e-sae sweep` and `e2e-sae compare` do it, from Python. Run
again, it goes on where it stood. No network, no GPU; about a minute on two cores. Writes output/sweep, with sweep.csv,
and output/compared, with report.html. The grid that tests the paper's findings is in reproduce_findings.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bundled import settings

from e2e_sae_plugin import (
    E2ESAERunnerConfig,
    Objective,
    SweepConfig,
    SweepKind,
    SweepRunner,
    compare,
    write_comparison,
)
from e2e_sae_plugin.comparison.subjects import load_subjects
from e2e_sae_plugin.demo import demo_tokens, load_demo_model

SPARSITIES = (20, 60)  # k of the TopK SAEs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40_000, help="of each SAE (%(default)s)")
    args = parser.parse_args()

    sweep = Path(f"output/sweep-{args.tokens}")
    cfg = SweepConfig(
        base=E2ESAERunnerConfig(**settings(None, args.tokens)),  # what all share; the grid replaces the rest
        kinds={
            "local": SweepKind(Objective.local(), SPARSITIES),
            # From scratch the KL is behind at so few tokens: half of them on the squared error first.
            "e2e": SweepKind(Objective.e2e(), SPARSITIES, {"local_first": 0.5}),
            "e2e+ds": SweepKind(Objective.e2e_downstream(beta=1e-4), SPARSITIES, {"local_first": 0.5}),
        },
        output_path=sweep,
    )
    SweepRunner(cfg).run()
    print((sweep / "sweep.csv").read_text())

    model, tokens = load_demo_model(), demo_tokens("evaluation", 128)[:64]
    found = compare(load_subjects([str(sweep)]), model, tokens, n_cards=3, card_tokens=4096)
    for finding in found.findings:
        print(f"{finding.title}: {finding.verdict}")
        for line in finding.evidence:
            print(f"  {line}")
    files = write_comparison(found, "output/compared", "A small sweep on the bundled model")
    print(f"\n{len(found.subjects)} SAEs on {tokens.numel():,} held-out tokens; the page: {files['report.html']}")


if __name__ == "__main__":
    main()
