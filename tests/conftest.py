"""What holds for every test: no network, and threads that do not fight over two cores."""

import os

# Before any test module imports transformers, datasets or torch: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
