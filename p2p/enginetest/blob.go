package enginetest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// Where an engine's blobs have files, these can be handed over.
func testFileBlob(t *testing.T, e p2p.Engine) {
	for _, size := range []int{0, 1000, 3*digest.MinPieceLength + 17} {
		data := Content(size, 1)
		task := Import(t, e, "t", data)
		blob, other := openFile(t, e, task), openFile(t, e, task)
		if blob == nil {
			return // others are copied, which the engine over a socket shows
		}
		requireReadOnly(t, blob.File())
		table := blob.Table()
		requireTable(t, table, int64(size))
		if table.Digest != task.Digest || len(table.CRC) != table.Pieces() {
			t.Errorf("the table of %s is that of %s, with %d checksums", task.Digest, table.Digest, len(table.CRC))
		}
		for i := range table.CRC {
			requirePiece(t, blob, data, i)
		}
		// Whoever has one duplicate does not move the offset of another one.
		if _, err := blob.File().Seek(1, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		if at, err := other.File().Seek(0, io.SeekCurrent); err != nil || at != 0 {
			t.Errorf("the file of another Open is at %d, %v", at, err)
		}
		duplicate := duplicateOf(t, blob.File())
		if _, err := e.Delete(t.Context(), "t", digest.FromDigest(task.Digest), p2p.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		blob.Close()
		read, err := io.ReadAll(io.NewSectionReader(duplicate, 0, int64(size)+1))
		if err != nil || !bytes.Equal(read, data) {
			t.Errorf("a duplicate of a deleted blob's descriptor gives %d of %d bytes, %v", len(read), size, err)
		}
	}
}

// openFile returns nil where the blob has no file. It is closed with the test.
func openFile(t *testing.T, e p2p.Engine, task p2p.Task) p2p.FileBlob {
	t.Helper()
	blob, err := e.Open(t.Context(), task, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { blob.Close() })
	file, _ := blob.(p2p.FileBlob)
	return file
}

func duplicateOf(t *testing.T, f *os.File) *os.File {
	t.Helper()
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	fd := -1
	if controlErr := raw.Control(func(from uintptr) {
		fd, err = unix.FcntlInt(from, unix.F_DUPFD_CLOEXEC, 0)
	}); controlErr != nil || err != nil {
		t.Fatal(controlErr, err)
	}
	duplicate := os.NewFile(uintptr(fd), "duplicate")
	t.Cleanup(func() { duplicate.Close() })
	return duplicate
}

func requireReadOnly(t *testing.T, f *os.File) {
	t.Helper()
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("writing to the blob's file: %v; want %v", err, unix.EBADF)
	}
}

// requireTable checks what is known of a blob from the beginning.
func requireTable(t *testing.T, table *digest.Table, size int64) {
	t.Helper()
	if table.Size != size || table.PieceLength != digest.PieceLength(size) {
		t.Fatalf("the table is of %d bytes in pieces of %d, want %d bytes", table.Size, table.PieceLength, size)
	}
}

// requirePiece checks that piece i can be read in the file, with its checksum in the table.
func requirePiece(t *testing.T, blob p2p.FileBlob, data []byte, i int) {
	t.Helper()
	start, end := blob.Table().Bounds(i)
	piece := make([]byte, end-start)
	if _, err := blob.File().ReadAt(piece, start); err != nil || !bytes.Equal(piece, data[start:end]) {
		t.Errorf("the file does not have piece %d (%v)", i, err)
	}
	if got, want := blob.Table().CRC[i], digest.CRC32C(piece); got != want {
		t.Errorf("the checksum of piece %d is %08x, want %08x", i, got, want)
	}
}

// RequireArriving fails the test unless blob arrives as a [p2p.ArrivingBlob] does, and is data
// in the end. Nothing else is to hold it up: it waits for all of it. It does not close it.
func RequireArriving(t *testing.T, blob p2p.ArrivingBlob, data []byte) {
	t.Helper()
	requireReadOnly(t, blob.File())
	table := blob.Table()
	requireTable(t, table, int64(len(data)))
	pieces := table.Pieces()
	for _, w := range [][2]int{{-1, 0}, {1, 0}, {0, pieces}, {0, 1 << 40}} {
		blob.Want(w[0], w[1]) // of this there is nothing to fetch
	}
	if pieces > 0 {
		blob.Want(pieces-1, pieces-1)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	yielded := 0
	for _, err := range blob.Arrived(ended) {
		if yielded++; err != nil {
			requireError(t, "arrived, with a context that has ended", err, context.Canceled)
			break
		}
	}
	if yielded > pieces+1 {
		t.Errorf("%d pieces were yielded of %d", yielded, pieces)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, err := range blob.Arrived(ctx) { // one that stops early harms nobody
		if err != nil {
			t.Fatal(err)
		}
		break
	}
	arrived := make([]bool, pieces)
	for i, err := range blob.Arrived(ctx) {
		if err != nil {
			t.Fatalf("after %d of %d pieces: %v", len(arrived), pieces, err)
		}
		if i < 0 || i >= pieces || arrived[i] {
			t.Fatalf("piece %d of %d arrives, or does so again", i, pieces)
		}
		arrived[i] = true
		requirePiece(t, blob, data, i)
	}
	for i, ok := range arrived {
		if !ok {
			t.Errorf("piece %d did not arrive", i)
		}
	}
	copied := expecting(data)
	if err := blob.CopyRange(t.Context(), &copied, 0, blob.Size(), nil); err != nil || len(copied) > 0 {
		t.Errorf("the content copied is not the content that has arrived (%v)", err)
	}
}
