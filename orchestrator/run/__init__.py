"""What starts the workers and watches over them; the home of ray."""
