"""Local supervision of the roles, and the doctor."""
