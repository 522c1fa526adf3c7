"""What tests share: tiny models, runs of them, and the ComfyUI, the browser and the device that tests use."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
