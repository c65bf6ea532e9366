"""The LightningModule around litgpt's GPT, what it may change, and its export."""
