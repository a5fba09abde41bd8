"""The shipped configurations, installed as package data."""
