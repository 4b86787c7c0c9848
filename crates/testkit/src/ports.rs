//! Ports on 127.0.0.1 that no two tests get at once.
//!
//! A port is taken by an exclusive lock on a file named after it, held for as long as the [`Port`] lives: that holds
//! between threads and between test binaries, also while nobody listens (a server that is down), and the kernel frees
//! it when the process dies. Ports lie below the range from which the kernel picks ports of outgoing connections,
//! which could otherwise take the port of a server that restarts.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use rand::Rng;

/// Linux picks from 32768 upwards for outgoing connections; well-known services lie below 20000.
const RANGE: std::ops::Range<u16> = 20_000..32_000;

/// One port of 127.0.0.1, ours until dropped.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _lock: File,
}

impl Port {
    /// Takes a free port.
    pub fn take() -> Result<Self> {
        let folder = lock_folder()?;
        let start = rand::rng().random_range(RANGE);
        for number in (start..RANGE.end).chain(RANGE.start..start) {
            let lock = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(folder.join(number.to_string()))
                .with_context(|| format!("open a lock file in {}", folder.display()))?;
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => continue,
                Err(TryLockError::Error(error)) => return Err(error).context("lock a port"),
            }
            if TcpListener::bind((Ipv4Addr::LOCALHOST, number)).is_ok() {
                return Ok(Self { number, _lock: lock });
            }
        }
        bail!("no free port between {} and {}", RANGE.start, RANGE.end)
    }

    /// The number.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// `127.0.0.1:<number>`.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.number))
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address().fmt(f)
    }
}

fn lock_folder() -> Result<PathBuf> {
    // Per user: another user's lock files cannot be opened.
    let user = rustix::process::getuid().as_raw();
    let folder = std::env::temp_dir().join(format!("farshore-ports-{user}"));
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_port_is_handed_out_twice() {
        let threads: Vec<_> =
            (0..8).map(|_| std::thread::spawn(|| (0..50).map(|_| Port::take()).collect::<Result<Vec<_>>>())).collect();
        let mut held = Vec::new();
        for thread in threads {
            held.extend(thread.join().expect("takes ports").expect("ports are free"));
        }
        let numbers: BTreeSet<u16> = held.iter().map(Port::number).collect();
        assert_eq!(numbers.len(), 400);
        assert!(numbers.iter().all(|number| RANGE.contains(number)));
    }

    #[test]
    fn a_port_can_be_listened_on() {
        let port = Port::take().expect("a port is free");
        TcpListener::bind(port.address()).expect("the port is ours");
    }
}
