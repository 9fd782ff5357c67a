"""Forward and backward passes written out by hand, where that saves memory and time. Each equals plain code in the tests."""
