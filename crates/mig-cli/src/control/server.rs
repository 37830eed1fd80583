//! The control socket itself: several clients at once, each on a thread of its own, none of them trusted.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::{Answer, MAX_LINE_BYTES, Request};
use crate::event::Event;
use crate::failure::Failure;

/// The most clients at a time.
const MAX_CLIENTS: usize = 32;
/// How long a client may leave an answer unread before it is dropped.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);
/// How long a program that ends waits for its last answers to be written.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// What answers requests.
pub trait Commands: Send + Sync + 'static {
    /// Answers one; `watch` hands events to the client that asked for them, and never waits.
    fn answer(&self, request: &Request, watch: &(dyn Fn(&Event) + Sync)) -> Answer;
}

/// Which socket is this program's, whatever is at its path by now.
#[derive(Debug, Clone)]
pub struct Socket {
    path: PathBuf,
    /// Device and inode, so that only this one is removed.
    identity: (u64, u64),
}

impl Socket {
    /// Takes it away, unless it is gone or another's has taken its place.
    pub fn remove(&self) {
        if self.path.symlink_metadata().is_ok_and(|m| (m.dev(), m.ino()) == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A control socket that is listened on; dropping it takes the socket away.
#[derive(Debug)]
pub struct Server {
    socket: Socket,
    listener: Option<UnixListener>,
    busy: Arc<Busy>,
}

/// How many requests are being answered.
#[derive(Debug, Default)]
struct Busy {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Server {
    /// Listens on `path`. A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// The path is taken, or not to be written.
    pub fn bind(path: &Path) -> Result<Self, Failure> {
        let failure = |cause: String, remedy: &str| Failure::new("control", "control", cause, remedy);
        let shown = path.display();
        if let Ok(metadata) = path.symlink_metadata() {
            if !metadata.file_type().is_socket() {
                return Err(failure(
                    format!("{shown} exists and is no socket"),
                    "choose another path for --control",
                ));
            }
            match UnixStream::connect(path) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(|e| {
                        failure(format!("cannot replace {shown}: {e}"), "choose another path for --control")
                    })?;
                }
                _ => {
                    return Err(failure(
                        format!("{shown} is in use by another program"),
                        "choose another path for --control, or end that program",
                    ));
                }
            }
        }
        let cannot = |e: io::Error| {
            failure(
                format!("cannot listen on unix:{shown}: {e}"),
                "choose a path in a directory that can be written, of at most 107 bytes",
            )
        };
        let listener = UnixListener::bind(path).map_err(cannot)?;
        // Whoever can connect can end the guest.
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).map_err(cannot)?;
        let metadata = path.symlink_metadata().map_err(cannot)?;
        Ok(Self {
            socket: Socket { path: path.to_owned(), identity: (metadata.dev(), metadata.ino()) },
            listener: Some(listener),
            busy: Arc::default(),
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.socket.path
    }

    /// Its socket, for those who may have to end the program.
    pub fn socket(&self) -> Socket {
        self.socket.clone()
    }

    /// Answers clients from now on, on threads of its own.
    pub fn serve(&mut self, commands: Arc<dyn Commands>) {
        let Some(listener) = self.listener.take() else { return };
        let busy = Arc::clone(&self.busy);
        let clients = Arc::new(AtomicUsize::new(0));
        thread::spawn(move || {
            for stream in listener.incoming() {
                // Out of descriptors, most likely: breathe instead of spinning.
                let Ok(stream) = stream else {
                    thread::sleep(Duration::from_millis(50));
                    continue;
                };
                let (commands, busy, clients) =
                    (Arc::clone(&commands), Arc::clone(&busy), Arc::clone(&clients));
                if clients.fetch_add(1, Ordering::SeqCst) >= MAX_CLIENTS {
                    clients.fetch_sub(1, Ordering::SeqCst);
                    turn_away(stream);
                    continue;
                }
                thread::spawn(move || {
                    // A client that is gone is no failure of the holder's.
                    let _ = converse(stream, &*commands, &busy);
                    clients.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
    }

    /// Waits until every request that is being answered has its answer, a short while at most.
    pub fn finish(&self) {
        let count = self.busy.count.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.busy.changed.wait_timeout_while(count, CLOSE_PATIENCE, |count| *count > 0);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.socket.remove();
    }
}

fn turn_away(mut stream: UnixStream) {
    let failure = Failure::new(
        "control",
        "control",
        format!("{MAX_CLIENTS} clients are connected already"),
        "close some of them",
    );
    let _ = stream.set_write_timeout(Some(Duration::from_millis(100)));
    let _ = stream.write_all(Answer::error(&failure).line().as_bytes());
}

fn converse(stream: UnixStream, commands: &dyn Commands, busy: &Busy) -> io::Result<()> {
    stream.set_write_timeout(Some(WRITE_PATIENCE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = Vec::new();
    loop {
        line.clear();
        (&mut reader).take(MAX_LINE_BYTES as u64 + 1).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let _busy = busy.enter();
        if line.len() > MAX_LINE_BYTES {
            let failure = Failure::new(
                "control",
                "control",
                format!("the line is longer than {MAX_LINE_BYTES} bytes"),
                "send shorter lines",
            );
            return (&stream).write_all(Answer::error(&failure).line().as_bytes());
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let answer = match Request::parse(&line) {
            Ok(request) => answer(&stream, commands, &request),
            Err(failure) => Answer::error(&failure),
        };
        (&stream).write_all(answer.line().as_bytes())?;
    }
}

/// Answers a request, sending events on the way if they are asked for. They are written by a thread of
/// their own, so that a client that does not read never holds up a migration.
fn answer(stream: &UnixStream, commands: &dyn Commands, request: &Request) -> Answer {
    let wants_events = matches!(request, Request::Migrate(migrate) if migrate.progress);
    if !wants_events {
        return commands.answer(request, &|_| {});
    }
    let (sender, receiver) = std::sync::mpsc::channel::<Event>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut stream = stream;
            for event in receiver {
                let Ok(text) = serde_json::to_string(&event) else { continue };
                if stream.write_all((text + "\n").as_bytes()).is_err() {
                    return;
                }
            }
        });
        let sender = Mutex::new(sender);
        // The answer follows when the scope has joined the writer, which ends as the sender is dropped.
        commands.answer(request, &|event| {
            let _ = sender.lock().unwrap_or_else(PoisonError::into_inner).send(event.clone());
        })
    })
}

impl Busy {
    fn enter(&self) -> impl Drop + '_ {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Answering { busy: self }
    }
}

struct Answering<'a> {
    busy: &'a Busy,
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        *self.busy.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.busy.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;
    use serde_json::Value;

    struct Fake;

    impl Commands for Fake {
        fn answer(&self, request: &Request, watch: &(dyn Fn(&Event) + Sync)) -> Answer {
            match request {
                Request::Migrate(_) => {
                    watch(&Event::Paused);
                    watch(&Event::Committed);
                    Answer::ok(&())
                }
                Request::Pause => {
                    thread::sleep(Duration::from_millis(200));
                    Answer::ok(&())
                }
                _ => {
                    let state = "running".into();
                    Answer::ok(&Status { state, heartbeats: 1, vcpus: 1, memory_bytes: 1, doubt: None })
                }
            }
        }
    }

    fn served() -> (tempfile::TempDir, Server) {
        let directory = tempfile::tempdir().unwrap();
        let mut server = Server::bind(&directory.path().join("control")).unwrap();
        server.serve(Arc::new(Fake));
        (directory, server)
    }

    struct Peer {
        stream: UnixStream,
        reader: BufReader<UnixStream>,
    }

    impl Peer {
        fn connect(server: &Server) -> Self {
            let stream = UnixStream::connect(server.path()).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            Self { reader: BufReader::new(stream.try_clone().unwrap()), stream }
        }

        fn say(&mut self, line: &[u8]) {
            self.stream.write_all(line).unwrap();
        }

        fn hear(&mut self) -> Value {
            let mut line = String::new();
            self.reader.read_line(&mut line).unwrap();
            serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"))
        }
    }

    #[test]
    fn several_clients_are_answered_line_by_line() {
        let (_directory, server) = served();
        let (mut one, mut two) = (Peer::connect(&server), Peer::connect(&server));
        one.say(b"{\"cmd\":\"status\"}\n{\"cmd\":\"status\"}\n");
        two.say(b"{\"cmd\":\"quit\"}\n");
        assert_eq!(two.hear()["ok"], true);
        assert_eq!(one.hear()["state"], "running");
        assert_eq!(one.hear()["heartbeats"], 1);
    }

    #[test]
    fn nonsense_is_answered_and_the_conversation_goes_on() {
        let (_directory, server) = served();
        let mut peer = Peer::connect(&server);
        for line in [&b"GET / HTTP/1.1\r\n"[..], b"\xff\xfe\x00\n", b"{\"cmd\":\"explode\"}\n", b"null\n"] {
            peer.say(line);
            let answer = peer.hear();
            assert_eq!(answer["ok"], false);
            for part in ["side", "step", "cause", "remedy"] {
                assert!(answer["error"][part].as_str().is_some_and(|t| !t.is_empty()), "{part}: {answer}");
            }
        }
        peer.say(b"\n{\"cmd\":\"status\"}\n");
        assert_eq!(peer.hear()["ok"], true);
    }

    #[test]
    fn a_line_without_end_is_refused_and_the_client_dropped() {
        let (_directory, server) = served();
        let mut peer = Peer::connect(&server);
        let longest = [b" ".repeat(MAX_LINE_BYTES - 17), b"{\"cmd\":\"status\"}\n".to_vec()].concat();
        assert_eq!(longest.len(), MAX_LINE_BYTES);
        peer.say(&longest);
        assert_eq!(peer.hear()["ok"], true, "a line of the longest kind is read");
        peer.say(&b"x".repeat(MAX_LINE_BYTES + 1));
        assert!(peer.hear()["error"]["cause"].as_str().unwrap().contains("longer"));
        let mut rest = Vec::new();
        assert_eq!(peer.reader.read_to_end(&mut rest).unwrap(), 0);
        let mut other = Peer::connect(&server);
        other.say(b"{\"cmd\":\"status\"}\n");
        assert_eq!(other.hear()["ok"], true, "others are still answered");
    }

    #[test]
    fn events_come_before_the_answer_and_only_to_who_asked() {
        let (_directory, server) = served();
        let mut peer = Peer::connect(&server);
        peer.say(b"{\"cmd\":\"migrate\",\"to\":\"tcp:h:1\",\"progress\":true}\n");
        assert_eq!(peer.hear()["event"], "paused");
        assert_eq!(peer.hear()["event"], "committed");
        assert_eq!(peer.hear()["ok"], true);
        peer.say(b"{\"cmd\":\"migrate\",\"to\":\"tcp:h:1\"}\n");
        assert_eq!(peer.hear()["ok"], true);
    }

    #[test]
    fn too_many_clients_are_told_so() {
        let (_directory, server) = served();
        let mut peers: Vec<Peer> = (0..MAX_CLIENTS).map(|_| Peer::connect(&server)).collect();
        for peer in &mut peers {
            peer.say(b"{\"cmd\":\"status\"}\n");
            assert_eq!(peer.hear()["ok"], true);
        }
        let mut late = Peer::connect(&server);
        assert!(late.hear()["error"]["cause"].as_str().unwrap().contains("already"));
    }

    #[test]
    fn finishing_waits_for_the_answer_that_is_being_made() {
        let (_directory, server) = served();
        let mut peer = Peer::connect(&server);
        // the one request there is, so that it is the one that is waited for
        peer.say(b"{\"cmd\":\"pause\"}\n");
        while *server.busy.count.lock().unwrap() == 0 {
            thread::yield_now();
        }
        server.finish();
        assert_eq!(*server.busy.count.lock().unwrap(), 0);
        peer.stream.set_nonblocking(true).unwrap();
        assert_eq!(peer.hear()["ok"], true, "the answer is there already");
    }

    #[test]
    fn a_socket_in_use_is_kept_a_stale_one_replaced_and_a_file_left_alone() {
        let (directory, server) = served();
        let in_use = Server::bind(server.path()).unwrap_err();
        assert!(in_use.cause.contains("in use"), "{in_use:?}");
        let stale = directory.path().join("stale");
        drop(UnixListener::bind(&stale).unwrap());
        assert!(stale.exists());
        drop(Server::bind(&stale).unwrap());
        assert!(!stale.exists(), "the socket is taken away at the end");
        let file = directory.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(Server::bind(&file).unwrap_err().cause.contains("no socket"));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
        assert!(Server::bind(Path::new("/nonexistent/control")).is_err());
    }
}
