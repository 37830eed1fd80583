//! Where a receiver listens: `tcp:HOST:PORT`, with an IPv6 address in brackets.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// A place to connect to or to listen on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Address {
    pub(crate) host: String,
    pub(crate) port: u16,
}

/// Why a text is no address.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[allow(missing_docs)]
pub enum AddressError {
    #[error("'{text}' has no transport; write tcp:HOST:PORT")]
    NoTransport { text: String },
    #[error("transport '{transport}' is not known; tcp is")]
    UnknownTransport { transport: String },
    #[error("'{text}' has no port; write tcp:HOST:PORT")]
    NoPort { text: String },
    #[error("port '{port}' is not a number from 0 to 65535")]
    BadPort { port: String },
    #[error("'{text}' has no host; write tcp:HOST:PORT")]
    NoHost { text: String },
    #[error("an IPv6 address goes in brackets: tcp:[{host}]:PORT")]
    NoBrackets { host: String },
}

impl Address {
    /// TCP to `host` (a name, an IPv4 address, or an IPv6 address without brackets).
    pub fn tcp(host: impl Into<String>, port: u16) -> Self {
        Self { host: host.into(), port }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (transport, rest) =
            text.split_once(':').ok_or_else(|| AddressError::NoTransport { text: text.into() })?;
        if transport != "tcp" {
            return Err(AddressError::UnknownTransport { transport: transport.into() });
        }
        let (host, port) = rest.rsplit_once(':').ok_or_else(|| AddressError::NoPort { text: text.into() })?;
        let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let host = match bracketed {
            Some(host) => host,
            None if host.contains(':') => return Err(AddressError::NoBrackets { host: host.into() }),
            None => host,
        };
        if host.is_empty() {
            return Err(AddressError::NoHost { text: text.into() });
        }
        let port = port.parse().map_err(|_| AddressError::BadPort { port: port.into() })?;
        Ok(Self::tcp(host, port))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "tcp:[{host}]:{port}") } else { write!(f, "tcp:{host}:{port}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back_as_they_were_written() {
        for text in ["tcp:localhost:4444", "tcp:127.0.0.1:0", "tcp:[::1]:65535", "tcp:host.example:1"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_wrong_with_an_address_is_said() {
        let error = |text: &str| text.parse::<Address>().unwrap_err();
        assert!(matches!(error("localhost"), AddressError::NoTransport { .. }));
        assert!(matches!(error("udp:localhost:1"), AddressError::UnknownTransport { .. }));
        assert!(matches!(error("tcp:localhost"), AddressError::NoPort { .. }));
        assert!(matches!(error("tcp:localhost:70000"), AddressError::BadPort { .. }));
        assert!(matches!(error("tcp::1"), AddressError::NoHost { .. }));
        assert!(matches!(error("tcp:::1:80"), AddressError::NoBrackets { .. }));
    }
}
