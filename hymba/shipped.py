"""The trained model that the package brings: what is used where no model is named, offline."""

from pathlib import Path

SHIPPED_MODEL = "hymba-austen"
SHIPPED_FOLDER = Path(__file__).resolve().parent / "assets" / SHIPPED_MODEL
