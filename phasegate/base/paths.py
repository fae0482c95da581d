"""Name the files and folders that stages read and write."""

from pathlib import Path

RAW = Path("data/raw")
SCHEMA = Path("data/params.schema.json")
PREPARED = Path("data/prepared")
EVALUATED = Path("data/evaluated")
MODELS = Path("models")
BASELINES = MODELS / "p7a/baseline"
SURVEYS = MODELS / "survey"
HEADS = MODELS / "heads"
REPORTS = Path("reports")
TABLES = REPORTS / "tables"
FIGURES = REPORTS / "figures"
TIMINGS = REPORTS / "timings.csv"
EARLY = MODELS / "early"
