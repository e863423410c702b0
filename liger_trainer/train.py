"""Entry point of ``python -m liger_trainer.train RECIPE.yaml``."""

from .training.train import main

if __name__ == "__main__":
    main()
