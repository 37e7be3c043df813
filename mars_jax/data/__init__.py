"""From files to static-shape batches: records, chat template and label mask, images, splits, batches."""
