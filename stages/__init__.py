"""The pipeline's steps, one file per DVC stage: files in, files out."""
