"""The public class: a store of facts in adapters, opened, read and written."""
