//! A TCP proxy with the vices of a long way.
//!
//! Each direction of each connection is a reader that stamps what it reads with the time it is due, a bounded queue,
//! and a writer that waits for that time, for the direction's share of bandwidth (common to all connections) and while
//! the direction is held. Cutting closes connections and refuses new ones, as a reset VPN does; holding keeps them open
//! while bytes of one direction stay in the proxy, as a half-open connection does.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};

use crate::ports::Port;
use crate::wait;

/// Bytes read at once: small, so that a low bandwidth is smooth.
const CHUNK: usize = 16 * 1024;
/// Chunks on their way in one direction of one connection: 32 MiB, more than a second of a fast link.
const IN_FLIGHT: usize = 2048;
/// An unanswered connection attempt of the proxy is given up after this.
const CONNECT: Duration = Duration::from_secs(5);

/// A direction, seen from the side that opens connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the dialling side to the listening side.
    Forward,
    /// From the listening side to the dialling side.
    Back,
}

/// How one direction treats its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Conditions {
    /// Time each byte is on its way.
    pub delay: Duration,
    /// Bytes per second of all connections together; none is unlimited.
    pub bandwidth: Option<u64>,
    /// Bytes stay in the proxy.
    pub hold: bool,
}

/// One direction, shared by all connections.
struct Lane {
    conditions: watch::Sender<Conditions>,
    /// When the bandwidth is free again.
    free_at: Mutex<Instant>,
    bytes: AtomicU64,
}

/// A running proxy; ends with its connections when dropped.
pub struct TcpProxy {
    port: Arc<Port>,
    lanes: [Arc<Lane>; 2],
    open: watch::Sender<bool>,
    listening: watch::Receiver<bool>,
    connections: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl TcpProxy {
    /// Listens on a port of its own and passes connections on to `target`.
    pub async fn start(target: SocketAddr) -> Result<Self> {
        let port = Arc::new(Port::take()?);
        let lanes = [Arc::new(Lane::new()), Arc::new(Lane::new())];
        let (open, open_seen) = watch::channel(true);
        let (set_listening, listening) = watch::channel(false);
        let connections = Arc::new(AtomicU64::new(0));
        let server =
            Server { port: Arc::clone(&port), target, lanes: lanes.clone(), connections: Arc::clone(&connections) };
        let task = tokio::spawn(server.run(open_seen, set_listening));
        let proxy = Self { port, lanes, open, listening, connections, task };
        proxy.reached(true).await?;
        Ok(proxy)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// The same delay each way: half of the round trip.
    pub fn set_delay(&self, delay: Duration) {
        self.change_both(|conditions| conditions.delay = delay);
    }

    /// The same cap each way, bytes per second.
    pub fn set_bandwidth(&self, bandwidth: Option<u64>) {
        self.change_both(|conditions| conditions.bandwidth = bandwidth);
    }

    /// Holds the bytes of one direction; connections stay open.
    pub fn hold(&self, direction: Direction) {
        self.change(direction, |conditions| conditions.hold = true);
    }

    /// Closes all connections and refuses new ones until [`Self::heal`]; returns when nothing listens any more.
    pub async fn cut(&self) -> Result<()> {
        self.open.send_replace(false);
        self.reached(false).await
    }

    /// Ends cuts and holds; delay and bandwidth stay. Returns when it listens again.
    pub async fn heal(&self) -> Result<()> {
        self.change_both(|conditions| conditions.hold = false);
        self.open.send_replace(true);
        self.reached(true).await
    }

    /// Changes the conditions of one direction.
    pub fn change(&self, direction: Direction, change: impl FnOnce(&mut Conditions)) {
        self.lanes[direction as usize].conditions.send_modify(change);
    }

    /// Bytes delivered in one direction.
    pub fn bytes(&self, direction: Direction) -> u64 {
        self.lanes[direction as usize].bytes.load(Ordering::Relaxed)
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    fn change_both(&self, change: impl Fn(&mut Conditions)) {
        for lane in &self.lanes {
            lane.conditions.send_modify(&change);
        }
    }

    async fn reached(&self, listening: bool) -> Result<()> {
        let mut seen = self.listening.clone();
        let reached = timeout(Duration::from_secs(10), seen.wait_for(|now| *now == listening)).await;
        reached.context("the proxy's port does not follow")?.context("the proxy has ended")?;
        Ok(())
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Lane {
    fn new() -> Self {
        let conditions = watch::channel(Conditions::default()).0;
        Self { conditions, free_at: Mutex::new(Instant::now()), bytes: AtomicU64::new(0) }
    }

    /// When `bytes` may leave, by the bandwidth; takes the time they need.
    fn reserve(&self, bytes: usize) -> Instant {
        let now = Instant::now();
        let Some(bandwidth) = self.conditions.borrow().bandwidth else {
            return now;
        };
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let start = now.max(*free_at);
        *free_at = start + Duration::from_secs_f64(bytes as f64 / bandwidth as f64);
        *free_at
    }
}

struct Server {
    port: Arc<Port>,
    target: SocketAddr,
    lanes: [Arc<Lane>; 2],
    connections: Arc<AtomicU64>,
}

impl Server {
    /// Listens while `open`; each closing drops all connections.
    async fn run(self, mut open: watch::Receiver<bool>, listening: watch::Sender<bool>) {
        loop {
            let bind = || TcpListener::bind(self.port.address());
            match wait::until("the proxy's port", Duration::from_secs(10), bind).await {
                Ok(listener) => {
                    listening.send_replace(true);
                    self.serve(&listener, &mut open).await;
                }
                Err(error) => return eprintln!("{error:#}"),
            }
            listening.send_replace(false);
            if open.wait_for(|open| *open).await.is_err() {
                return;
            }
        }
    }

    /// Until cut. The connections' tasks end with the set they are in.
    async fn serve(&self, listener: &TcpListener, open: &mut watch::Receiver<bool>) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                _ = open.wait_for(|open| !*open) => break,
                Some(_) = connections.join_next() => {}
                accepted = listener.accept() => if let Ok((dialler, _)) = accepted {
                    self.connections.fetch_add(1, Ordering::Relaxed);
                    connections.spawn(connection(dialler, self.target, self.lanes.clone()));
                },
            }
        }
        connections.shutdown().await;
    }
}

async fn connection(dialler: TcpStream, target: SocketAddr, [forward, back]: [Arc<Lane>; 2]) {
    let Ok(Ok(listener)) = timeout(CONNECT, TcpStream::connect(target)).await else {
        return;
    };
    let _ = dialler.set_nodelay(true);
    let _ = listener.set_nodelay(true);
    let (from_dialler, to_dialler) = dialler.into_split();
    let (from_listener, to_listener) = listener.into_split();
    // An end of one direction (a half-close) is passed on; an error ends both.
    let _ = tokio::try_join!(pump(from_dialler, to_listener, forward), pump(from_listener, to_dialler, back));
}

async fn pump(from: OwnedReadHalf, to: OwnedWriteHalf, lane: Arc<Lane>) -> std::io::Result<()> {
    let (send, receive) = mpsc::channel(IN_FLIGHT);
    tokio::try_join!(read(from, send, &lane), write(to, receive, &lane))?;
    Ok(())
}

async fn read(mut from: OwnedReadHalf, queue: mpsc::Sender<(Instant, Vec<u8>)>, lane: &Lane) -> std::io::Result<()> {
    loop {
        let mut chunk = vec![0; CHUNK];
        let length = from.read(&mut chunk).await?;
        if length == 0 {
            return Ok(());
        }
        chunk.truncate(length);
        let due = Instant::now() + lane.conditions.borrow().delay;
        if queue.send((due, chunk)).await.is_err() {
            return Ok(());
        }
    }
}

async fn write(
    mut to: OwnedWriteHalf,
    mut queue: mpsc::Receiver<(Instant, Vec<u8>)>,
    lane: &Lane,
) -> std::io::Result<()> {
    let mut conditions = lane.conditions.subscribe();
    while let Some((due, chunk)) = queue.recv().await {
        sleep_until(due).await;
        sleep_until(lane.reserve(chunk.len())).await;
        let released = conditions.wait_for(|conditions| !conditions.hold).await.is_ok();
        if !released {
            break;
        }
        to.write_all(&chunk).await?;
        lane.bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
    }
    // The end of a direction is held like its bytes.
    let _ = conditions.wait_for(|conditions| !conditions.hold).await;
    to.shutdown().await
}
