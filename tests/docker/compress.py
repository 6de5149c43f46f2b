"""Run the compiled pipeline in the images under kfp.local, one container per stage: `python compress.py FOLDER USER`.

FOLDER holds a model `dense` and a text `corpus`, and receives the artifacts. It is the only part of the host that a container
sees and, besides /tmp, the only place that it may write to. The GPU stages run in the CPU image. The containers get the
secrets in this process's environment.
"""

import os
import sys
from pathlib import Path

from kfp import components, local

from components.images import CPU_IMAGE, GPU_IMAGE

COMPILED = Path(__file__).parents[2] / "pipelines" / "compiled"
SECRETS = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN")


def main(folder: Path, user: str) -> None:
    runner = local.DockerRunner(
        user=f"{user}:0",
        environment={name: os.environ[name] for name in SECRETS} | {"OMP_NUM_THREADS": "1"},
        network_mode="none",
        read_only=True,
        tmpfs={"/tmp": ""},
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
    )
    local.init(runner, pipeline_root=str(folder), workspace_root=str(folder / "workspace"))
    compiled = (COMPILED / "compress.yaml").read_text().replace(f"image: {GPU_IMAGE}", f"image: {CPU_IMAGE}")
    components.load_component_from_text(compiled)(
        model_id=str(folder / "dense"),
        train_data=str(folder / "corpus"),
        eval_data=str(folder / "corpus"),
        nsamples=4,
        seq_len=32,
        eval_blocks=4,
        eval_seq_len=32,
        distill_max_steps=4,
        distill_batch_size=2,
        distill_grad_accum_steps=1,
        distill_learning_rate=1e-3,
        **dict.fromkeys(("prune_gpus", "distill_gpus", "quantize_gpus"), 0),
        publish_to=str(folder / "published"),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
