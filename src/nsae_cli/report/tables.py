"""Every terminal table of nsae. Each function returns a rich renderable, except the `…_findings`: sentences."""

from nsae_cli.report.audit_table import audit_table
from nsae_cli.report.bench_table import bench_table
from nsae_cli.report.comparison_tables import comparison_table
from nsae_cli.report.eval_tables import eval_findings, eval_table
from nsae_cli.report.feature_tables import features_table
from nsae_cli.report.norm_tables import norms_table
from nsae_cli.report.top_norm_tables import top_norms_findings, top_norms_table
from nsae_cli.report.train_tables import train_table
from nsae_cli.report.workspace_table import workspace_table

__all__ = [
    "audit_table",
    "bench_table",
    "comparison_table",
    "eval_findings",
    "eval_table",
    "features_table",
    "norms_table",
    "top_norms_findings",
    "top_norms_table",
    "train_table",
    "workspace_table",
]
