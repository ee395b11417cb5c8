"""One decoder written as one-device maths; model families are values of its configuration."""
