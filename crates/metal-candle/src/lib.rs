//! metal-candle
