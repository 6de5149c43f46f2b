"""Run the distill stage from a shell: `python -m components.distill --teacher_model … --student_model … --mask_file …`."""

from components.core.cli import main
from components.distill.config import DistillConfig

if __name__ == "__main__":
    main(DistillConfig, "components.distill.stage")
