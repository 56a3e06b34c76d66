package rpc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// idSize is the length of a message in the descriptor channel: a big-endian id.
const idSize = 8

// window is how many bytes of messages may be under way, those of one call and
// those of all on a connection. Left to itself, gRPC pings with every message to
// find out how much the connection holds.
const window = 1 << 20

// callWindow is the same for what a client sends for one call and the daemon has not asked for yet: it is in
// memory. What it has asked for comes however long it is.
const callWindow = 64 << 10

// maxDescriptors is the number of descriptors in one message that there is
// room for. The kernel closes what does not fit, and says that it did.
const maxDescriptors = 2

var (
	errChannelClosed = errors.New("the descriptor channel is closed")
	errWithdrawn     = errors.New("the descriptor was withdrawn")
)

// channel is one end of the descriptor channel of a connection. Descriptors
// travel on it in both directions, each in a message of its own under an id
// that the client chose. A message without a descriptor withdraws the id.
//
// It reads on its own, so that nothing lies in the socket for longer than it
// has to: a descriptor keeps a deleted file's space, and a full socket would
// block the sender. Safe for concurrent use.
type channel struct {
	conn *net.UnixConn
	// keep counts a descriptor that no one waits for yet, or refuses it; nil: it is closed.
	keep    func() (leave func(), ok bool)
	sending chan struct{} // has a token in it while a message is sent
	ended   chan struct{} // closed when nothing is read any more

	mu    sync.Mutex
	slots map[uint64]chan int // of one descriptor each; made by whoever comes first
	kept  map[uint64]func()   // what ends that the descriptor of a slot is counted
	err   error               // why reading ended
}

// newChannel takes over conn. It calls onEnd, once, when the other side closed
// the channel or broke its rules, or when it is closed here.
func newChannel(conn *net.UnixConn, keep func() (leave func(), ok bool), onEnd func()) *channel {
	c := &channel{
		conn:    conn,
		keep:    keep,
		sending: make(chan struct{}, 1),
		ended:   make(chan struct{}),
		slots:   make(map[uint64]chan int),
		kept:    make(map[uint64]func()),
	}
	go c.read(onEnd)
	return c
}

// close closes the channel and every descriptor in it that was not taken.
func (c *channel) close() {
	c.conn.Close()
	<-c.ended
}

func (c *channel) read(onEnd func()) {
	defer close(c.ended)
	defer onEnd()
	err := c.readAll()
	c.conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	// A reset is a close before everything was read.
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, unix.ECONNRESET) {
		err = errChannelClosed
	}
	c.err = err
	for id := range c.slots {
		c.drop(id)
	}
}

func (c *channel) readAll() error {
	// One byte more than a message has, so that a longer one is noticed.
	b := make([]byte, idSize+1)
	oob := make([]byte, unix.CmsgSpace(4*maxDescriptors))
	for {
		n, oobn, flags, _, err := c.conn.ReadMsgUnix(b, oob)
		if err != nil {
			return err
		}
		fds, fdErr := parseRights(oob[:oobn], flags)
		if n == 0 && len(fds) == 0 && fdErr == nil {
			return io.EOF
		}
		id, err := parseID(b[:n])
		if err = errors.Join(fdErr, err); err == nil && len(fds) > 1 {
			err = fmt.Errorf("descriptor channel: %d descriptors in one message, want one", len(fds))
		}
		if err != nil {
			closeAll(fds)
			return err
		}
		if len(fds) == 0 {
			c.forget(id)
			continue
		}
		if err := c.deliver(id, fds[0]); err != nil {
			unix.Close(fds[0])
			return err
		}
	}
}

// parseID decodes a message of the descriptor channel.
func parseID(b []byte) (uint64, error) {
	if len(b) != idSize {
		return 0, fmt.Errorf("descriptor channel: message has not the %d bytes of an id", idSize)
	}
	return binary.BigEndian.Uint64(b), nil
}

// parseRights returns the descriptors that came with a message. They are the
// caller's to close, with an error too.
func parseRights(oob []byte, flags int) (fds []int, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message: %w", err)
	}
	for _, m := range messages {
		// ParseUnixRights panics where there is half a descriptor.
		if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SCM_RIGHTS || len(m.Data)%4 != 0 {
			err = errors.New("control message of an unknown kind")
			continue
		}
		got, parseErr := unix.ParseUnixRights(&m)
		if parseErr != nil {
			err = fmt.Errorf("control message: %w", parseErr)
		}
		fds = append(fds, got...)
	}
	if err == nil && flags&unix.MSG_CTRUNC != 0 {
		err = errors.New("more descriptors than expected, or no room to open them")
	}
	return fds, err
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// deliver puts fd where it is taken from. With an error it is still the caller's.
func (c *channel) deliver(id uint64, fd int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	slot, ok := c.slots[id]
	if !ok {
		if c.keep == nil {
			unix.Close(fd) // whoever asked for it gave up
			return nil
		}
		leave, ok := c.keep()
		if !ok {
			return errors.New("descriptor channel: too many descriptors that no call takes")
		}
		slot, c.kept[id] = c.slot(id), leave
	}
	select {
	case slot <- fd:
		return nil
	default:
		return fmt.Errorf("descriptor channel: two descriptors under id %d", id)
	}
}

// slot returns where the descriptor under id goes. c.mu is held.
func (c *channel) slot(id uint64) chan int {
	slot, ok := c.slots[id]
	if !ok {
		slot = make(chan int, 1)
		c.slots[id] = slot
	}
	return slot
}

// drop closes the slot of id and the descriptor in it. c.mu is held.
func (c *channel) drop(id uint64) {
	slot, ok := c.slots[id]
	if !ok {
		return
	}
	delete(c.slots, id)
	if leave := c.kept[id]; leave != nil {
		leave()
		delete(c.kept, id)
	}
	close(slot)
	for fd := range slot {
		unix.Close(fd)
	}
}

// expect says that the descriptor under id will be taken. It is followed by
// forget.
func (c *channel) expect(id uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	c.slot(id)
	return nil
}

// forget closes the descriptor under id where it was not taken.
func (c *channel) forget(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(id)
}

// take waits for the descriptor under id, which is then the caller's to close.
// It fails with the cause of ctx when that ends first.
func (c *channel) take(ctx context.Context, id uint64) (fd int, err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return -1, c.err
	}
	slot := c.slot(id)
	c.mu.Unlock()
	defer c.forget(id)
	select {
	case fd, ok := <-slot:
		if ok {
			return fd, nil
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.err != nil {
			return -1, c.err
		}
		return -1, errWithdrawn
	case <-ctx.Done():
		return -1, context.Cause(ctx)
	}
}

// send hands the file behind f to the other side, under id. f stays the caller's.
func (c *channel) send(ctx context.Context, id uint64, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := raw.Control(func(fd uintptr) {
		err = c.write(ctx, id, unix.UnixRights(int(fd)))
	})
	if err := errors.Join(controlErr, err); err != nil {
		return fmt.Errorf("send a file descriptor: %w", err)
	}
	return nil
}

// withdraw tells the other side to close the descriptor under id, where it did
// not take it yet. It waits only where that is far behind with its reading; one
// that does not read at all loses the connection.
func (c *channel) withdraw(id uint64) {
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	defer cancel()
	if err := c.write(ctx, id, nil); err != nil {
		c.conn.Close()
	}
}

// write sends one message.
func (c *channel) write(ctx context.Context, id uint64, oob []byte) error {
	select {
	case c.sending <- struct{}{}:
		defer func() { <-c.sending }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return interruptible(ctx, c.conn.SetWriteDeadline, func() error {
		_, _, err := c.conn.WriteMsgUnix(binary.BigEndian.AppendUint64(nil, id), oob, nil)
		return err
	})
}

// interruptible runs do, and makes the reading or writing in it fail when ctx
// ends, by way of setDeadline. It then fails with the cause of ctx.
func interruptible(ctx context.Context, setDeadline func(time.Time) error, do func() error) error {
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = setDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	err := do()
	if !stop() {
		<-interrupted
		_ = setDeadline(time.Time{})
		if err != nil {
			return context.Cause(ctx)
		}
	}
	return err
}
