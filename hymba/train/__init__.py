"""From text to a trained model: data, optimiser, schedule, loop, checkpoints."""
