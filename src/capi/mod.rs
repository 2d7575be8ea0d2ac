//! The C surface: one file per section of `macula.h`. It checks arguments, stops panics and calls the rooms below.
