"""An exported Hugging Face folder as ONNX, by torch.onnx, checked in onnxruntime."""

from pathlib import Path

import numpy as np

from mammodino_jax.errors import UserError

TOLERANCE = 1e-4  # of features, whose scale is about 1


def write_onnx(folder: Path, height: int, width: int) -> float:
    """Write `folder`/model.onnx beside the weights of `folder`.

    Its input is `pixel_values`, float32 [batch, C, height, width], normalised; its outputs are `cls`
    [batch, D] and `patches` [batch, N, D], after the final norm. The batch is free; height and
    width are not, because torch.export keeps the positions resampled for the size that it saw.

    Returns:
      The largest difference between PyTorch's features and onnxruntime's, on random inputs.

    Raises:
      UserError: a package is missing or broken, the size no multiple of the patch size, or features differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it, and says so only later)
        import torch
        from transformers import AutoModel
    except ImportError as error:
        raise UserError(
            f"ONNX export needs {error.name}, which is not installed: pip install 'mammodino-jax[onnx]'"
        ) from None
    try:
        model = AutoModel.from_pretrained(folder)
    except (ImportError, RuntimeError) as error:  # it imports its models, and torchvision, only now
        raise UserError(
            f"transformers cannot build the model ({str(error).strip()[:200]}): often a torchvision that does"
            " not belong to this torch; install the one that does, or uninstall torchvision"
        ) from None
    patch, registers = model.config.patch_size, getattr(model.config, "num_register_tokens", 0)
    if height % patch or width % patch or min(height, width) <= 0:
        raise UserError(f"--size {height} {width} must be positive multiples of the patch size {patch}")

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            tokens = self.model(pixel_values=pixel_values).last_hidden_state
            return tokens[:, 0], tokens[:, 1 + registers :]

    features, file = Features().eval(), folder / "model.onnx"
    images = torch.randn(3, model.config.num_channels, height, width, generator=torch.manual_seed(0))
    large = sum(p.nbytes for p in model.parameters()) > 2**30  # a file of ONNX holds 2 GiB at most
    torch.onnx.export(
        features, (images[:2],), file, input_names=["pixel_values"], output_names=["cls", "patches"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}}, dynamo=True, external_data=large,
        verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = features(images)
    got = session.run(["cls", "patches"], {"pixel_values": images.numpy()})
    worst = max(float(np.abs(a.numpy() - b).max()) for a, b in zip(expected, got, strict=True))
    if not worst <= TOLERANCE:
        raise UserError(
            f"onnxruntime's features differ from PyTorch's by {worst:.1e}, more than {TOLERANCE:.0e}: "
            "nothing is written; try other versions of torch and onnxruntime"
        )
    return worst
