"""What an evaluation leaves behind: scores with intervals, a record, predictions, a page, a comparison."""
