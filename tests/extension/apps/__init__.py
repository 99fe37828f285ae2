"""Application scripts against live servers, and against stand-ins where no live server can be had."""
