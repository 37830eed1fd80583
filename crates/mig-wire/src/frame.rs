//! The messages of the control channel.
//!
//! [`Message::encode`] gives a whole frame, [`Message::decode`] takes the header and the body that were read.
//! The header carries the CRC of a message's body; state sections carry checksums of their own besides, since
//! they are also kept in files.

use std::time::Duration;

use crate::bytes::{Reader, WireError, Writer};
use crate::describe::{self, Description, Refusal};
use crate::fault::Fault;
use crate::header::{HEADER_BYTES, Header, Kind};
use crate::hello::{Attach, Hello, Query, Welcome};
use crate::section::{self, Section};

/// The most digests in one message.
pub const MAX_DIGESTS: usize = 8192;
/// The most chunks whose page digests one mismatch may carry.
pub const MAX_MISMATCHES: usize = 8;
/// The most pages in a chunk.
pub const MAX_CHUNK_PAGES: usize = 512;

/// What the destination says its part of the pause will cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct DestinationCosts {
    /// Restoring the state.
    pub load: Duration,
    /// Starting the vCPUs.
    pub resume: Duration,
    /// Computing the digests of all memory.
    pub verify: Duration,
}

/// The page digests of a chunk that differs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ChunkDigests {
    /// The chunk.
    pub chunk: u64,
    /// A digest of each of its pages, as the destination holds them.
    pub pages: Vec<u64>,
}

/// What a destination says became of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    /// The guest never ran there and, since the destination gave it up before it said so, never will.
    Never,
    /// It runs there.
    Running {
        /// Time spent resuming it.
        resume: Duration,
        /// For how long it has run.
        running_for: Duration,
    },
    /// It was to run there and could not be started: nobody can promise that it did nothing.
    Lost,
    /// Not decided yet, or a session that this process does not know: worth asking again.
    Unknown,
}

impl Fate {
    fn write(self, writer: &mut Writer) {
        match self {
            Self::Never => {
                writer.u8(0);
            }
            Self::Running { resume, running_for } => {
                writer.u8(1);
                write_duration(writer, resume);
                write_duration(writer, running_for);
            }
            Self::Lost => {
                writer.u8(2);
            }
            Self::Unknown => {
                writer.u8(3);
            }
        }
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        match reader.u8()? {
            0 => Ok(Self::Never),
            1 => Ok(Self::Running { resume: read_duration(reader)?, running_for: read_duration(reader)? }),
            2 => Ok(Self::Lost),
            3 => Ok(Self::Unknown),
            value => Err(WireError::Unknown { what: "fate", value: u64::from(value) }),
        }
    }
}

/// A message of the control channel, or the first two on another connection: `Attach` and `Attached` on a page
/// channel, `Query` and `Outcome` on that of a source in doubt.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Message {
    /// Source: versions, capabilities, session.
    Hello(Hello),
    /// Destination: what was chosen.
    Welcome(Welcome),
    /// Source: the guest.
    Describe(Box<Description>),
    /// Destination: prepared; its share of the pause.
    Accept(DestinationCosts),
    /// Destination: it will not do; every reason.
    Refuse(Vec<Refusal>),
    /// Source, on a page channel: it belongs to the session.
    Attach(Attach),
    /// Destination, on a page channel: taken.
    Attached,
    /// Destination: all pages of the round are in place.
    RoundAck {
        /// The round.
        round: u32,
    },
    /// Source: vCPU and device state; `round` is the last round of pages.
    State {
        /// The last round.
        round: u32,
        /// The state.
        sections: Vec<Section>,
    },
    /// Source: digests of chunks, in order, from `first_chunk`.
    Digests {
        /// The first chunk.
        first_chunk: u64,
        /// One digest a chunk.
        digests: Vec<u64>,
    },
    /// Destination: everything is applied and verified; only Commit is missing.
    Ready {
        /// Time spent on digests.
        verify: Duration,
        /// Time spent restoring.
        load: Duration,
    },
    /// Destination: memory differs, so it will not run the guest.
    Mismatch {
        /// How many chunks differ.
        chunks: u64,
        /// The first few of them.
        samples: Vec<ChunkDigests>,
    },
    /// Source: gives the guest away.
    Commit,
    /// Destination: runs the guest.
    Running {
        /// Time spent resuming it.
        resume: Duration,
    },
    /// Destination: what the guest felt, once known; `None` when it cannot be.
    Gap(Option<Duration>),
    /// Either: it ends here. From the destination it is also a promise: the guest never ran there, and
    /// never will in this session.
    Abort(Fault),
    /// Destination: it failed after Commit, so it cannot promise that the guest never ran.
    Lost(Fault),
    /// Either: are you there?
    Ping(u64),
    /// Either: yes, to the ping with this number.
    Pong(u64),
    /// Source, on a connection of its own: what became of the session?
    Query(Query),
    /// Destination: this.
    Outcome(Fate),
    /// How the destination timed its start: what the news of [`Message::Running`] takes on its way is no part of
    /// the guest's pause.
    Started {
        /// From Ready to the guest running, on the destination's clock.
        since_ready: Duration,
    },
}

impl Message {
    /// The kind of frame it travels in.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::Welcome(_) => Kind::Welcome,
            Self::Describe(_) => Kind::Describe,
            Self::Accept(_) => Kind::Accept,
            Self::Refuse(_) => Kind::Refuse,
            Self::Attach(_) => Kind::Attach,
            Self::Attached => Kind::Attached,
            Self::RoundAck { .. } => Kind::RoundAck,
            Self::State { .. } => Kind::State,
            Self::Digests { .. } => Kind::Digests,
            Self::Ready { .. } => Kind::Ready,
            Self::Mismatch { .. } => Kind::Mismatch,
            Self::Commit => Kind::Commit,
            Self::Running { .. } => Kind::Running,
            Self::Gap(_) => Kind::Gap,
            Self::Abort(_) => Kind::Abort,
            Self::Lost(_) => Kind::Lost,
            Self::Ping(_) => Kind::Ping,
            Self::Pong(_) => Kind::Pong,
            Self::Query(_) => Kind::Query,
            Self::Outcome(_) => Kind::Outcome,
            Self::Started { .. } => Kind::Started,
        }
    }

    /// The whole frame.
    ///
    /// # Errors
    /// [`WireError::TooMany`] when the body is above the limit of its kind: a guest with more state than the
    /// protocol carries.
    pub fn encode(&self, sequence: u64, session: u64) -> Result<Vec<u8>, WireError> {
        let mut writer = Writer::new();
        writer.raw(&[0; HEADER_BYTES]);
        self.write_body(&mut writer);
        let mut frame = writer.into_bytes();
        let (length, limit) = (frame.len() - HEADER_BYTES, self.kind().max_body_bytes());
        if length > limit {
            return Err(WireError::TooMany {
                what: "frame length",
                value: length as u64,
                limit: limit as u64,
            });
        }
        let length = u32::try_from(length).expect("limits fit 32 bits");
        let body_crc = crc32c::crc32c(&frame[HEADER_BYTES..]);
        let header = Header { kind: self.kind(), items: 0, length, round: 0, sequence, session, body_crc };
        frame[..HEADER_BYTES].copy_from_slice(&header.encode());
        Ok(frame)
    }

    fn write_body(&self, writer: &mut Writer) {
        match self {
            Self::Hello(hello) => hello.write(writer),
            Self::Welcome(welcome) => welcome.write(writer),
            Self::Describe(description) => description.write(writer),
            Self::Accept(costs) => {
                for duration in [costs.load, costs.resume, costs.verify] {
                    write_duration(writer, duration);
                }
            }
            Self::Refuse(refusals) => describe::write_refusals(writer, refusals),
            Self::Attach(attach) => attach.write(writer),
            Self::Attached | Self::Commit => {}
            Self::RoundAck { round } => {
                writer.u32(*round);
            }
            Self::State { round, sections } => {
                writer.u32(*round);
                section::write_all(writer, sections);
            }
            Self::Digests { first_chunk, digests } => {
                writer.u64(*first_chunk);
                write_words(writer, digests);
            }
            Self::Ready { verify, load } => {
                write_duration(writer, *verify);
                write_duration(writer, *load);
            }
            Self::Mismatch { chunks, samples } => {
                writer.u64(*chunks).count(samples.len());
                for sample in samples {
                    writer.u64(sample.chunk);
                    write_words(writer, &sample.pages);
                }
            }
            Self::Running { resume } => write_duration(writer, *resume),
            Self::Gap(gap) => {
                if let Some(gap) = gap {
                    write_duration(writer, *gap);
                }
            }
            Self::Abort(fault) | Self::Lost(fault) => fault.write(writer),
            Self::Ping(token) | Self::Pong(token) => {
                writer.u64(*token);
            }
            Self::Query(query) => query.write(writer),
            Self::Outcome(fate) => fate.write(writer),
            Self::Started { since_ready } => write_duration(writer, *since_ready),
        }
    }

    /// Reads a message from what followed its header.
    ///
    /// # Errors
    /// Any [`WireError`]: a bound exceeded, bytes missing or left over, a kind that is no message.
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let (claimed, actual) = (header.body_crc, crc32c::crc32c(body));
        if claimed != actual {
            return Err(WireError::Checksum { what: name(header.kind), claimed, actual });
        }
        let mut reader = Reader::new(name(header.kind), body);
        let message = Self::read_body(header.kind, &mut reader)?;
        reader.finish()?;
        Ok(message)
    }

    fn read_body(kind: Kind, reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(match kind {
            Kind::Hello => Self::Hello(Hello::read(reader)?),
            Kind::Welcome => Self::Welcome(Welcome::read(reader)?),
            Kind::Describe => Self::Describe(Box::new(Description::read(reader)?)),
            Kind::Accept => Self::Accept(DestinationCosts {
                load: read_duration(reader)?,
                resume: read_duration(reader)?,
                verify: read_duration(reader)?,
            }),
            Kind::Refuse => Self::Refuse(describe::read_refusals(reader)?),
            Kind::Attach => Self::Attach(Attach::read(reader)?),
            Kind::Attached => Self::Attached,
            Kind::RoundAck => Self::RoundAck { round: reader.u32()? },
            Kind::State => Self::State { round: reader.u32()?, sections: section::read_all(reader)? },
            Kind::Digests => {
                Self::Digests { first_chunk: reader.u64()?, digests: read_words(reader, MAX_DIGESTS)? }
            }
            Kind::Ready => Self::Ready { verify: read_duration(reader)?, load: read_duration(reader)? },
            Kind::Mismatch => Self::Mismatch {
                chunks: reader.u64()?,
                samples: (0..reader.count(MAX_MISMATCHES, 12)?)
                    .map(|_| {
                        Ok(ChunkDigests { chunk: reader.u64()?, pages: read_words(reader, MAX_CHUNK_PAGES)? })
                    })
                    .collect::<Result<_, WireError>>()?,
            },
            Kind::Commit => Self::Commit,
            Kind::Running => Self::Running { resume: read_duration(reader)? },
            Kind::Gap => {
                let known = !reader.left().is_empty();
                Self::Gap(known.then(|| read_duration(reader)).transpose()?)
            }
            Kind::Abort => Self::Abort(Fault::read(reader)?),
            Kind::Lost => Self::Lost(Fault::read(reader)?),
            Kind::Ping => Self::Ping(reader.u64()?),
            Kind::Pong => Self::Pong(reader.u64()?),
            Kind::Query => Self::Query(Query::read(reader)?),
            Kind::Outcome => Self::Outcome(Fate::read(reader)?),
            Kind::Started => Self::Started { since_ready: read_duration(reader)? },
            Kind::Pages | Kind::RoundEnd => {
                return Err(WireError::Unknown { what: "message kind", value: kind as u64 });
            }
        })
    }
}

/// The name of a kind, for errors.
fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Hello => "hello",
        Kind::Welcome => "welcome",
        Kind::Describe => "description",
        Kind::Accept => "accept",
        Kind::Refuse => "refusal",
        Kind::Attach => "attach",
        Kind::Attached => "attached",
        Kind::Pages => "pages",
        Kind::RoundEnd => "round end",
        Kind::RoundAck => "round acknowledgement",
        Kind::State => "state",
        Kind::Digests => "digests",
        Kind::Ready => "ready",
        Kind::Mismatch => "mismatch",
        Kind::Commit => "commit",
        Kind::Running => "running",
        Kind::Gap => "gap",
        Kind::Abort => "abort",
        Kind::Lost => "lost",
        Kind::Ping => "ping",
        Kind::Pong => "pong",
        Kind::Query => "query",
        Kind::Outcome => "outcome",
        Kind::Started => "started",
    }
}

fn write_duration(writer: &mut Writer, duration: Duration) {
    writer.u64(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
}

fn read_duration(reader: &mut Reader<'_>) -> Result<Duration, WireError> {
    reader.u64().map(Duration::from_nanos)
}

fn write_words(writer: &mut Writer, words: &[u64]) {
    writer.count(words.len());
    for word in words {
        writer.u64(*word);
    }
}

fn read_words(reader: &mut Reader<'_>, limit: usize) -> Result<Vec<u64>, WireError> {
    (0..reader.count(limit, 8)?).map(|_| reader.u64()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::describe::{Region, Schema};
    use crate::fault::{Blame, Side, Step};

    fn text() -> impl Strategy<Value = String> {
        proptest::collection::vec(any::<char>(), 0..20).prop_map(|c| c.into_iter().collect())
    }

    fn duration() -> impl Strategy<Value = Duration> {
        any::<u64>().prop_map(Duration::from_nanos)
    }

    fn section() -> impl Strategy<Value = Section> {
        let body = proptest::collection::vec(any::<u8>(), 0..200);
        let name = "[a-z.]{0,20}";
        (name, any::<u32>(), any::<u16>(), any::<bool>(), body).prop_map(
            |(name, instance, version, critical, body)| Section { name, instance, version, critical, body },
        )
    }

    fn description() -> impl Strategy<Value = Description> {
        let region =
            (any::<u64>(), any::<u64>()).prop_map(|(guest_address, bytes)| Region { guest_address, bytes });
        let schema = ("[a-z.]{0,20}", any::<u16>()).prop_map(|(name, version)| Schema { name, version });
        (
            (text(), any::<u32>(), any::<u32>()),
            proptest::collection::vec(region, 0..5),
            any::<Option<[u8; 16]>>(),
            proptest::collection::vec(schema, 0..5),
            proptest::collection::vec(section(), 0..3),
        )
            .prop_map(|((architecture, page_bytes, vcpus), regions, boot_id, schemas, platform)| {
                Description { architecture, page_bytes, vcpus, regions, boot_id, schemas, platform }
            })
    }

    fn fault() -> impl Strategy<Value = Fault> {
        let step = prop_oneof![Just(Step::Connect), Just(Step::Resume), any::<u32>().prop_map(Step::Round)];
        (any::<bool>(), step, any::<bool>(), text(), text()).prop_map(
            |(source, step, local, cause, remedy)| Fault {
                side: if source { Side::Source } else { Side::Destination },
                step,
                blame: if local { Blame::Local } else { Blame::Network },
                cause,
                remedy,
            },
        )
    }

    fn fate() -> impl Strategy<Value = Fate> {
        prop_oneof![
            Just(Fate::Never),
            Just(Fate::Lost),
            Just(Fate::Unknown),
            (duration(), duration()).prop_map(|(resume, running_for)| Fate::Running { resume, running_for }),
        ]
    }

    fn message() -> impl Strategy<Value = Message> {
        let words = |n| proptest::collection::vec(any::<u64>(), 0..n);
        let hello =
            (any::<[u16; 3]>(), any::<[u64; 2]>(), any::<[u8; 16]>()).prop_map(|(s, c, session)| Hello {
                version_min: s[0],
                version_max: s[1],
                required: c[0],
                optional: c[1],
                channels: s[2],
                session,
            });
        let refusal =
            (text(), text(), text()).prop_map(|(what, cause, remedy)| Refusal { what, cause, remedy });
        let sample = (any::<u64>(), words(20)).prop_map(|(chunk, pages)| ChunkDigests { chunk, pages });
        prop_oneof![
            hello.prop_map(Message::Hello),
            (any::<u16>(), any::<u64>(), any::<u16>(), any::<[u8; 16]>()).prop_map(
                |(version, capabilities, channels, secret)| Message::Welcome(Welcome {
                    version,
                    capabilities,
                    channels,
                    secret
                })
            ),
            description().prop_map(|d| Message::Describe(Box::new(d))),
            (duration(), duration(), duration()).prop_map(|(load, resume, verify)| Message::Accept(
                DestinationCosts { load, resume, verify }
            )),
            proptest::collection::vec(refusal, 0..5).prop_map(Message::Refuse),
            (any::<[u8; 16]>(), any::<[u8; 16]>(), any::<u16>())
                .prop_map(|(session, secret, channel)| Message::Attach(Attach { session, secret, channel })),
            Just(Message::Attached),
            any::<u32>().prop_map(|round| Message::RoundAck { round }),
            (any::<u32>(), proptest::collection::vec(section(), 0..5))
                .prop_map(|(round, sections)| Message::State { round, sections }),
            (any::<u64>(), words(50))
                .prop_map(|(first_chunk, digests)| Message::Digests { first_chunk, digests }),
            (duration(), duration()).prop_map(|(verify, load)| Message::Ready { verify, load }),
            (any::<u64>(), proptest::collection::vec(sample, 0..4))
                .prop_map(|(chunks, samples)| Message::Mismatch { chunks, samples }),
            Just(Message::Commit),
            duration().prop_map(|resume| Message::Running { resume }),
            proptest::option::of(duration()).prop_map(Message::Gap),
            fault().prop_map(Message::Abort),
            fault().prop_map(Message::Lost),
            any::<u64>().prop_map(Message::Ping),
            any::<u64>().prop_map(Message::Pong),
            (any::<[u8; 16]>(), any::<[u8; 16]>())
                .prop_map(|(session, secret)| Message::Query(Query { session, secret })),
            fate().prop_map(Message::Outcome),
            duration().prop_map(|since_ready| Message::Started { since_ready }),
        ]
    }

    fn split(frame: &[u8]) -> (Header, &[u8]) {
        let (head, body) = frame.split_first_chunk().unwrap();
        (Header::decode(head).unwrap(), body)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn ten_thousand_random_messages_come_back_and_damage_is_an_error(
            message in message(), at in any::<prop::sample::Index>(), flip in 1..=255u8
        ) {
            let frame = message.encode(3, 4).unwrap();
            let (header, body) = split(&frame);
            prop_assert_eq!(header.body_bytes(), body.len());
            prop_assert_eq!(Message::decode(&header, body), Ok(message.clone()));
            if !body.is_empty() {
                let short = &body[..at.index(body.len())];
                prop_assert!(Message::decode(&header, short).is_err(), "a message cut short is an error");
                let mut damaged = body.to_vec();
                damaged[at.index(body.len())] ^= flip;
                prop_assert!(Message::decode(&header, &damaged).is_err(), "damage is an error");
                let resealed = Header { body_crc: crc32c::crc32c(&damaged), ..header };
                if let Ok(other) = Message::decode(&resealed, &damaged) {
                    prop_assert_ne!(other, message, "one message has one encoding");
                }
            }
        }
    }

    #[test]
    fn state_above_the_limit_is_refused_where_it_is_made() {
        let section =
            Section { name: "big".into(), instance: 0, version: 1, critical: true, body: vec![0; 4 << 20] };
        let sections = vec![section; 5];
        let error = Message::State { round: 0, sections }.encode(0, 0).unwrap_err();
        assert!(matches!(error, WireError::TooMany { what: "frame length", .. }));
    }
}
