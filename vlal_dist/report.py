"""`vlal report`: one self-contained HTML page about a run.

Reads what train and evaluate left in the run's root, and the dataset; never the model.
"""

import sys
from collections.abc import Mapping

from vlal_dist.config.sections import Config
from vlal_dist.pipeline import report_inputs, stage_remarks, stages_of
from vlal_dist.program import Counts, Program, run_program
from vlal_dist.reporting.page import build_page, render_page
from vlal_dist.storage.store import open_store

PURPOSE = """
Write RUN/report.html: run card, result as in Table 1 with class counts and intervals, a table of
all attributes, precision-recall curves, the paper's Fig. 4 grid, training curves, what the loss
ignored (needs paths.merged), likelihood against annotation. Run `vlal evaluate` first, with the
same --evaluation.split and --evaluation.predictor. The constant and the zero-shot CLIP predictor of
the same run appear when they were evaluated.
"""

PAGE = "report.html"


def work(config: Config, flags: Mapping[str, str]) -> Counts:
    """Write the page; returns the closing counts."""
    page = build_page(
        config.evaluation,
        config.paths,
        seed=config.training.seed,
        warnings=stage_remarks(stages_of(config)),
    )
    data = render_page(page)
    open_store(config.paths.run).replace(PAGE, data)
    return {
        "page": f"{config.paths.run}/{PAGE}",
        "bytes": len(data),
        "rows": len(page["rows"]),
        "attributes": len(page["attributes"]),
        "examples": len(page["examples"]),
        "mAP": page["result"]["groups"][0]["mAP"],
    }


PROGRAM = Program(
    name="report",
    usage="vlal report",
    purpose=PURPOSE,
    sections=("paths", "evaluation", "training", "observability"),
    output=lambda config, flags: config.paths.run,
    writes=lambda config, flags: ((config.paths.run, "report"),),
    work=work,
    inputs=report_inputs,
)


if __name__ == "__main__":
    sys.exit(run_program(PROGRAM, sys.argv[1:]))
