"""Features of one mammogram in PyTorch: python example.py RECORD [FEATURES.npz]

RECORD is a grey uint8 image, .npy or (with Pillow) PNG, with background 0, already at the size to read it at:
`python -m mammodino_jax.embed --save-images DIR` writes such files. Needs torch and transformers only.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

folder, file = Path(__file__).parent, sys.argv[1]
if file.endswith(".npy"):
    record = np.load(file)
else:
    from PIL import Image

    record = np.asarray(Image.open(file))
model = AutoModel.from_pretrained(folder).eval()
patch, registers = model.config.patch_size, getattr(model.config, "num_register_tokens", 0)
height, width = record.shape
record = np.pad(record, [(0, -height % patch), (0, -width % patch)])  # background below and to the right
about = json.loads((folder / "preprocessor_config.json").read_text())
mean, std = (torch.tensor(about[key])[:, None, None] for key in ("image_mean", "image_std"))
with torch.no_grad():
    x = (torch.from_numpy(record) / 255 - mean) / std  # [C, H, W]: grey is repeated to the C channels
    tokens = model(pixel_values=x[None]).last_hidden_state[0]
cls, patches = tokens[0], tokens[1 + registers :]
rows, cols = record.shape[0] // patch, record.shape[1] // patch
tissue = torch.from_numpy(record > 0).float().reshape(rows, patch, cols, patch).mean((1, 3)).flatten()
tissue_mean = tissue @ patches / tissue.sum()
print("CLS", cls[:4].tolist(), "mean of tissue patches", tissue_mean[:4].tolist())
if len(sys.argv) > 2:
    np.savez(sys.argv[2], cls=cls, patches=patches, tissue_mean=tissue_mean)
