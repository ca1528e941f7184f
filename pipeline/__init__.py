"""From records on disk to corrupted batches on the device: sample order, plan, DALI graph, loader."""
