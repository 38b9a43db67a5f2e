"""Image classification on 3×32×32 images: models, data sets, settings and the training run."""
