"""How data flows and how the two stages, pretraining and noisy fine-tuning, run."""

if __name__ != "noisyssl.pipelines":
    raise ImportError(
        "folder pipelines/ is the package noisyssl.pipelines: run `pip install -e .`, then import that name"
    )
