"""What the stages wrote about their work,
for the report: facts to show and warnings.
"""

from __future__ import annotations

from typing import Any, TypedDict

from ilrec_dist.cf.sasrec.checkpoint import read_report
from ilrec_dist.common.files import read_json_object
from ilrec_dist.common.manifest import MANIFEST, verified
from ilrec_dist.common.run_layout import ANALYSIS, BEST, RESULT, WEIGHTS_SHA256, RunFolders
from ilrec_dist.config.tree import Config
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.prompting import epoch_steps
from ilrec_dist.pipeline.records import verify_descriptions
from ilrec_dist.training.schedule import warmup_warning

# Keys of the data folder's manifest that say how it is stored and nothing about the data.
STORAGE_KEYS = ("version", "inputs", "files")


class ReportMaterial(TypedDict):
    """Arguments of `reporting.html.report.write_report`."""

    data_report: dict[str, Any]
    index_report: dict[str, Any]
    cf_report: dict[str, Any]
    warnings: list[str]
    analysis: dict[str, Any] | None


def report_material(config: Config, artifacts: RunArtifacts) -> ReportMaterial:
    """Read the reports of the stages prepare, index
    and cf; collect what the user must be told.
    """
    folders = artifacts.folders
    for stage in ("prepare", "index", "cf"):
        verify_descriptions(folders, stage)
    manifest = read_json_object(folders.data / MANIFEST)
    index_report = read_json_object(verified(folders.items, "report.json"))
    steps = epoch_steps(config, artifacts) * config.train.epochs
    warnings = [index_report.get("warning"), warmup_warning(config.train, steps)]
    return {
        "data_report": {key: value for key, value in manifest.items() if key not in STORAGE_KEYS},
        "index_report": index_report,
        "cf_report": read_report(folders.cf),
        "warnings": [warning for warning in warnings if warning],
        "analysis": _analysis(folders),
    }


def _analysis(folders: RunFolders) -> dict[str, Any] | None:
    """What `ilrec analyze` found, where it is of the weights that the run has now."""
    path = folders.root / ANALYSIS
    if not path.exists():
        return None
    analysis = read_json_object(path)
    result = folders.training(analysis["method"], analysis["seed"]) / RESULT
    if not result.exists():
        return None
    weights = read_json_object(result)[WEIGHTS_SHA256].get(BEST)
    return analysis if weights == analysis["weights"] else None
